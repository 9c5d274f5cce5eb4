"""molora as a PEFT tuner: named mixtures on one model, under PEFT's loaders, Trainer and TRL."""
