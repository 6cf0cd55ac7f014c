"""Students cut from a pretrained model: some of its layers, with its embeddings and head."""
