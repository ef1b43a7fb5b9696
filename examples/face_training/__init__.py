"""What examples/train_faces.py is made of: data, model, training, evaluation, report."""
