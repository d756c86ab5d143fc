"""The README's picture: what slimming the embedded model costs, as images and as figures.

`python -m benchmarks.picture --out docs/picture.png` calibrates the embedded model, makes slim models, and draws dense
beside slim images of the same captions and noise, what each is worth in ONNX Runtime, and its noise-prediction error
beside that of magnitude pruning at the same size. It prints a caption with the machine's name. The captions are of
scenes that the model's training never saw, the first ones of their seed; errors are measured on denoiser calls that
calibration has not seen.
"""
