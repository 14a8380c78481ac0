"""Look at run folders in the browser: verdict, layers, images, accuracy, export.

Reads what scan and repair wrote and never imports torch.
"""
