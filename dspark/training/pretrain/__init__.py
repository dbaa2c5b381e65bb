"""Training of a small DeepSeek-V4 from scratch: text, tokenizer, target, its drafts, export."""
