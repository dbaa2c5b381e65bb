"""An HTTP server that speaks OpenAI's API, with an engine behind it.

Needs the extra `serve`. The way of a request: `middleware` (log, host name, key), `api` (body,
response), `desk` (limits, prompt, grammar, a place in the queue), `worker` (the engine's thread),
and back as deltas through `jobs`, `choices` (reasoning, calls, log-probabilities) and `answers`.
"""
