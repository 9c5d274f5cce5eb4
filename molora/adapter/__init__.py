"""Adapter folders: ours and PEFT's LoRA, read strictly and written safely."""
