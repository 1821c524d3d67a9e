"""What `fastattn bench` measures: the engine offline, a server under load, the operators. Flags and JSON keys are vLLM's."""
