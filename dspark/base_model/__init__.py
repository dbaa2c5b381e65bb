"""The DeepSeek-V4 target: model, caches, checkpoint formats, chat encoding, cost model."""
