"""The task `digits-vqa`: a language model that has never seen an image answers questions about pictures of digits."""
