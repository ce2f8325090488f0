"""What launchers have in common: machines by one name everywhere, and processes whose logs are kept.

Nothing is exported here: what watches over processes is imported without jax, which `machines` needs.
"""
