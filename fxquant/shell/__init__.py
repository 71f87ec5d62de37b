"""The shell: the commands of ``fxquant`` and ``python -m fxquant``, the doctor, completion, the demo."""
