{{/* Where models come from, and how many pods their groups need. */}}

{{/* What the program is told as its model: a folder, an id on the hub, or nothing for the built-in one. */}}
{{- define "quire.modelPath" -}}
{{- if hasPrefix "pvc://" .uri -}}
/models/{{ trimPrefix "pvc://" .uri }}
{{- else if hasPrefix "hf://" .uri -}}
{{ trimPrefix "hf://" .uri }}
{{- end -}}
{{- end -}}

{{- define "quire.claim" -}}
{{- if hasPrefix "pvc://" .uri -}}
{{- index (splitList "/" (trimPrefix "pvc://" .uri)) 0 -}}
{{- end -}}
{{- end -}}

{{- define "quire.usesHub" -}}
{{- range .Values.models }}{{ if hasPrefix "hf://" .uri }}true{{ end }}{{ end -}}
{{- end -}}

{{- define "quire.tensorParallelSize" -}}
{{- dig "config" "tensor_parallel_size" 1 . | default 1 | int64 -}}
{{- end -}}

{{/* Pods of one group. */}}
{{- define "quire.hostsPerGroup" -}}
{{- $ranks := include "quire.tensorParallelSize" . | int64 -}}
{{- $perHost := int64 .workers.ranksPerHost -}}
{{- if and (ge $ranks $perHost) (mod $ranks $perHost) -}}
{{- fail (printf "models: a group of %s has %d ranks, which do not fill pods of workers.ranksPerHost %d; make tensor_parallel_size a multiple of ranksPerHost" .name $ranks $perHost) -}}
{{- end -}}
{{- if and (lt $ranks $perHost) (mod $perHost $ranks) -}}
{{- fail (printf "models: a pod of %s has workers.ranksPerHost %d, which is no multiple of the %d ranks of a group; some would stay unused" .name $perHost $ranks) -}}
{{- end -}}
{{- if and (gt $ranks $perHost) (eq .config.device "cuda") -}}
{{- fail (printf "models: a group of %s has %d GPUs in pods of workers.ranksPerHost %d, but GPUs of a group must be of one host; make ranksPerHost %d, on nodes with as many GPUs, or tensor_parallel_size smaller" .name $ranks $perHost $ranks) -}}
{{- end -}}
{{- max 1 (div $ranks $perHost) -}}
{{- end -}}

{{/* Replicas of KubeRay, each of hostsPerGroup pods: a group each, or several small groups in one pod. */}}
{{- define "quire.workerReplicas" -}}
{{- $ranks := mul (int64 .groups) (include "quire.tensorParallelSize" . | int64) -}}
{{- $perReplica := mul (include "quire.hostsPerGroup" . | int64) (int64 .workers.ranksPerHost) -}}
{{- div (add $ranks (sub $perReplica 1)) $perReplica -}}
{{- end -}}

{{- define "quire.workerMinAvailable" -}}
{{- $pods := mul (include "quire.workerReplicas" . | int64) (include "quire.hostsPerGroup" . | int64) -}}
{{- if lt (int64 .workers.minAvailable) 0 -}}{{ max 0 (sub $pods 1) }}{{- else -}}{{ int64 .workers.minAvailable }}{{- end -}}
{{- end -}}

{{/* Names of groups of pods are DNS labels. */}}
{{- define "quire.workerGroupName" -}}
{{- regexReplaceAll "[^a-z0-9]+" (lower .name) "-" | trunc 30 | trimAll "-" -}}
{{- end -}}

{{/* Resources of a pod with so many ranks: what the values say, and its GPUs. */}}
{{- define "quire.rankResources" -}}
{{- $resources := deepCopy .model.workers.resources -}}
{{- if eq .model.config.device "cuda" -}}
{{- $resources = merge (dict "limits" (dict .model.workers.gpuResource (int64 .ranks))) $resources -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}
