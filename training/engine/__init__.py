"""The engine that trains: DeepSpeed settings, and what differs where it holds the parameters."""
