"""A Task made portable: manifest, programs, signature; and what runs it."""
