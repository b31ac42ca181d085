"""mPLUG-Owl2 and its family on the Hugging Face stack."""
