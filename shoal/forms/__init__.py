"""Operations computed by other forms that are faster, or that a compiler can take: transformations of functions, with JAX alone."""
