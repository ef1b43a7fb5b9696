"""Drop-in replacements: each module has the names, signatures and conventions of another library.

Nothing of another library is imported here, and a module is imported only by those who ask for it:
``otface_cuda.compat.pot``, ``layers``, ``otface``, ``insightface`` and ``metric_learning``. docs/migrating.md has the
old line beside the new one for each, and says what is identical and what differs.
"""
