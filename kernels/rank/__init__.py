"""Every expert's ranks side by side: two narrow products and a gate."""
