"""`phi-run serve`: the OpenAI API over one model, and a chat page. Needs `phi-edge[server]`."""
