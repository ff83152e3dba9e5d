"""Sonoscope: from ultrasound and endoscopy video to a cross-validated report."""
