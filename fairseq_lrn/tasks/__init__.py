"""fairseq tasks, where fairseq has none that fits; importing this package registers them."""
