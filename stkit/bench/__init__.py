"""What is asked: the schema, routes, rendered walks, questions, released files and the audit."""
