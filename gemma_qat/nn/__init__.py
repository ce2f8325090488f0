"""Layers: contractions, norms, attention, feed-forward, experts, blocks, the scanned stack."""
