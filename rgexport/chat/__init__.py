"""What people talk through: tokenizer, chat template, sampling, conversation."""
