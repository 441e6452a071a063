"""Tables of others, converted once into CSV files that anyone can read, with a record of where they come from."""
