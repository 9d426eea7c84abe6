{{- define "finetune.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* Short enough for the longest suffix, "-dashboard-operator". */}}
{{- define "finetune.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 44 | trimSuffix "-" }}
{{- else }}
{{- $name := include "finetune.name" . }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 44 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 44 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "finetune.selectorLabels" -}}
app.kubernetes.io/name: {{ include "finetune.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "finetune.labels" -}}
{{ include "finetune.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "finetune.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "finetune.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* Takes {image, version}. */}}
{{- define "finetune.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ default .version .image.tag }}
{{- end }}
{{- end }}

{{/* The names of cluster-wide objects must differ between releases of the same name in two namespaces. */}}
{{- define "finetune.clusterName" -}}
{{- printf "%s-%s" .Release.Namespace (include "finetune.fullname" .) }}
{{- end }}

{{/* The settings file; docs/OPERATIONS.md describes it. */}}
{{- define "finetune.settings" -}}
trainerImage: {{ include "finetune.image" (dict "image" .Values.image.trainer "version" .Chart.AppVersion) | quote }}
imagePullPolicy: {{ .Values.image.trainer.pullPolicy }}
imagePullSecrets: {{ toJson .Values.image.trainer.pullSecrets }}
confinedNamespaces: {{ toJson .Values.networkPolicies.trainers.namespaces }}
{{ toYaml .Values.settings }}
{{- end }}
