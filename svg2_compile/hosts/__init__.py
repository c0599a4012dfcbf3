"""What is enabled in place: how calls of a module are wrapped, and what a pipeline of diffusers is made of."""
