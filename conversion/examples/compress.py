"""Compress a mixture, each expert to the width it deserves:
`python conversion/examples/compress.py [FOLDER] [OUT] [STEPS]`.

FOLDER is a mixture of experts, by default the one that training/examples/pretrain.py makes. It keeps three quarters of
its experts' parameters; then 50 steps with its own logits as targets win back some of what it lost.
"""

import subprocess
import sys

import mohge


folder, out, steps = (*sys.argv[1:], *("first-model", "compressed", "50")[len(sys.argv) - 1 :])

receipt = mohge.convert(
    folder,
    out,
    mode="trim",
    keep=0.75,
    multiple=16,
    calibration="standard-library",
    calibration_tokens=16384,
    calibration_length=256,
)
logits, parameters = receipt["logits"], receipt["parameters"]
print(f"parameters: {parameters['before']['total']:,} -> {parameters['after']['total']:,}")
print(f"perplexity: {logits['perplexity_before']:.2f} -> {logits['perplexity_after']:.2f}")

recover = f"mohge finetune --model {out} --datasets standard-library --distill {folder} --output_dir {out}-recovered"
settings = f"--max_steps {steps} --learning_rate 1e-4 --sequence_length 256 --per_device_train_batch_size 8"
command = [*recover.split(), *settings.split(), "--report_to", "none"]
subprocess.run([sys.executable, "-m", *command], check=True)
