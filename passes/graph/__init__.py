"""What every pass needs of FX graphs: values.py, nodes.py and sizes.py read them, builder.py inserts nodes."""
