"""A discrete-event simulator of serving: step costs and recorded acceptance in, speeds out."""
