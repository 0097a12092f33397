"""What makes an exported folder a model of sentence-transformers: its code, and the files that name it.

The modules whose names end in ``_imp`` are copied into the folder (``CODE``). They know no other part of the project,
for they run where it is not installed.
"""

# The modules that are copied, the one that sentence-transformers imports first.
CODE = ("modeling_imp.py", "network_imp.py", "preparing_imp.py", "decoding_imp.py")
