"""The SAME autoencoder, packed: decoder and encoder."""
