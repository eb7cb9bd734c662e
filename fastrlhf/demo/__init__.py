"""InstructGPT in miniature, from one command: see ``fastrlhf.demo.command``."""
