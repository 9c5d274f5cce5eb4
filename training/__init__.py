"""Training: the arguments, the job of ``molora train``, and the demo's model and data."""
