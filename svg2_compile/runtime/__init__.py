"""What happens at every call of a compiled graph: where the call stands, which graph runs, what is carried on."""
