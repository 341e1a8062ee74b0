"""What a person reads about a compiled model: roofline, explain, verify, the HTML view."""
