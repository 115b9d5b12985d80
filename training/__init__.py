"""Training of MoHGE models with Hugging Face Trainer."""
