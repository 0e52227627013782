"""The paper's relation-composition experiment: every arm and learning rate, all seeds of one side by side."""
