"""Floor 6: what does a researcher run? One module a command; nothing imports from here.

finetune    one run, from a YAML file and flags to a folder: config.py → rows.py → run.py
sweep       many of them, side by side: cells.py → run.py → report.py, page.py
harness     a model on lm-evaluation-harness's tasks
paper/      the paper's tables and figures
embedded/   the tiny models, data and corpus that need no network
"""
