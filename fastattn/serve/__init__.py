"""The OpenAI-compatible server: front, engine process, router, response cache, guardrails."""
