"""Where documents come from. Read in this order: documents, text_files, tables, hugging_face,
names."""
