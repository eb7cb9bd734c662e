"""fastrlhf: reinforcement learning from human feedback, as in InstructGPT."""
