"""fastrlhf: reinforcement learning from human feedback, as in InstructGPT."""

import os

# torch asks for it where runs must repeat to the bit (training.repeatable), and looks once, at the
# process's first matrix product on a GPU. On a Hopper GPU it is what torch takes by itself.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
