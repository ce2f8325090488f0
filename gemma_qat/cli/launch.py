"""What the scripts in launch/ are made of: machines by name, manifests, processes whose logs are kept."""

from __future__ import annotations

ACTIONS = {
    "machine": "what a machine such as v5p:4x4x4 or h100:4x8 is, as lines of NAME=VALUE",
    "vertex": "run a command on a host of a Vertex AI job, joined to the others",
}
"""Each is a module `launch_ACTION` beside this one, with the two functions that every verb has."""
