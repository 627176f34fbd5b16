"""A teacher: a language model behind an endpoint, that writes, annotates or judges texts."""
