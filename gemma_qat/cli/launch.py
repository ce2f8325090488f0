"""What the scripts in launch/ are made of: machines by name, manifests, processes whose logs are kept."""

from __future__ import annotations

ACTIONS = {
    "machine": "what a machine such as v5p:4x4x4 or h100:4x8 is, as lines of NAME=VALUE",
    "worker": "run a command as one of several processes: logs kept, signals passed on, saved and stopped told apart",
    "local": "run a command as N processes on the CPUs of this machine that share one run",
    "failures": "which of the processes whose logs are in a directory failed first, and its traceback",
    "render": "a run as a Kubernetes JobSet, for launch/gke.sh",
    "vertex": "run a command on a host of a Vertex AI job, joined to the others",
}
"""Each is a module `launch_ACTION` beside this one, with the two functions that every verb has."""
