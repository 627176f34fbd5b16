"""One file per architecture, named by Hugging Face's `model_type`."""
