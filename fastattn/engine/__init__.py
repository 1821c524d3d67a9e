"""What runs a model: requests, scheduler, KV cache, runner. No HTTP here."""
