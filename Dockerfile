# Two images from one file:
#   docker build -t quantserve .                      CPU, every x86-64 level in one image
#   docker build -t quantserve:gpu --target gpu .     NVIDIA GPUs and CPU
# docs/deploy.md says how each step was tried and how to run them.

ARG PYTHON=3.12-slim-bookworm
ARG CUDA=12.8.1
ARG UBUNTU=ubuntu24.04

# llama.cpp's backends become libraries of their own, one a processor generation; the best one is chosen when an engine starts.
# They are installed beside libllama.so, where the server looks for them.
ARG LLAMA_CPP="-DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON -DGGML_CPU_ALL_VARIANTS=ON -DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_SUBPROCESS=OFF -DCMAKE_INSTALL_BINDIR=llama_cpp/lib -DCMAKE_INSTALL_LIBDIR=llama_cpp/lib -DCMAKE_INSTALL_INCLUDEDIR=llama_cpp/include"


FROM nvidia/cuda:${CUDA}-devel-${UBUNTU} AS build-gpu
# Versions come from the distribution's release, which keeps only the newest of each package.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends cmake g++ ninja-build python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
RUN python3 -m venv /opt/quantserve
COPY constraints.txt ./
ARG LLAMA_CPP
# Compute capabilities, see CMAKE_CUDA_ARCHITECTURES: Ampere, Ada and Hopper.
ARG CUDA_ARCHITECTURES="80-real;86-real;89-real;90"
RUN CMAKE_ARGS="${LLAMA_CPP} -DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=${CUDA_ARCHITECTURES}" \
    /opt/quantserve/bin/pip install --no-cache-dir --constraint constraints.txt llama-cpp-python
COPY pyproject.toml README.md LICENSE ./
COPY quant quant
COPY server server
RUN /opt/quantserve/bin/pip install --no-cache-dir --constraint constraints.txt .


FROM nvidia/cuda:${CUDA}-runtime-${UBUNTU} AS gpu
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libgomp1 python3 \
 && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home quantserve \
 && install --directory --owner quantserve /cache
COPY --from=build-gpu /opt/quantserve /opt/quantserve
WORKDIR /app
COPY models.yaml ./
COPY models models
ENV PATH=/opt/quantserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    QUANTSERVE_HOST=0.0.0.0 \
    QUANTSERVE_CACHE=/cache \
    HF_HOME=/cache/huggingface
USER 10001
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
  CMD ["/opt/quantserve/bin/python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["quantserve"]
CMD ["serve"]


FROM python:${PYTHON} AS build-cpu
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends cmake g++ ninja-build \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
RUN python3 -m venv /opt/quantserve
COPY constraints.txt ./
ARG LLAMA_CPP
RUN CMAKE_ARGS="${LLAMA_CPP}" \
    /opt/quantserve/bin/pip install --no-cache-dir --constraint constraints.txt llama-cpp-python
COPY pyproject.toml README.md LICENSE ./
COPY quant quant
COPY server server
RUN /opt/quantserve/bin/pip install --no-cache-dir --constraint constraints.txt .


FROM python:${PYTHON} AS cpu
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libgomp1 \
 && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home quantserve \
 && install --directory --owner quantserve /cache
COPY --from=build-cpu /opt/quantserve /opt/quantserve
WORKDIR /app
COPY models.yaml ./
COPY models models
ENV PATH=/opt/quantserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    QUANTSERVE_HOST=0.0.0.0 \
    QUANTSERVE_CACHE=/cache \
    HF_HOME=/cache/huggingface
USER 10001
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
  CMD ["/opt/quantserve/bin/python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["quantserve"]
CMD ["serve"]
