"""Chat: tokenizer, template, sampling, conversations, scheduler, prefix store, state files."""
