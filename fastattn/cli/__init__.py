"""The command `fastattn`. What is heavy (torch, the engine) is imported when a command needs it, so that help is instant."""
