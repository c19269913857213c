"""What a step costs on chips that are not here, read from the program XLA compiles for them."""
