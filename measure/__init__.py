"""The maths of every diagnostic, to be imported: on models and tensors, without files, corpora or command lines."""
