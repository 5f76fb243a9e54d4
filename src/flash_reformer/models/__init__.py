"""What Hugging Face users import: configuration, models and their outputs."""
